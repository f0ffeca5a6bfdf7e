"""How is a corpus prepared? Passes over pieces of work, the tokenizer's sample, the manifest's assembly."""
