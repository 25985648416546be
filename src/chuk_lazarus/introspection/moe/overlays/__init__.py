"""What can be saved?"""
