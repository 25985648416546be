"""How was it trained?"""
