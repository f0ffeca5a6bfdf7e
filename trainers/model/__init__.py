"""What is the network? Backbone, layers, attention, loss over the vocabulary, LoRA."""
