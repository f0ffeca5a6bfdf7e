"""How good is the model, who chooses the checkpoint, and when is the test split opened?"""
