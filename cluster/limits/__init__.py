"""What is too large, too deep or not finite, of all that is given from outside?"""
