"""What will a run take? Memory, time, energy, storage; what is wrong before it starts."""
