"""How is a step computed on all workers? DeepSpeed ZeRO, partitions, collectives."""
