"""What is saved, what makes a checkpoint valid, and which is gone on from?"""
