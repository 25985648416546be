"""Is a conversion still the same model?"""
