"""What do the nodes of a cluster say of themselves, how fast is the network between them, and are they fit?"""
