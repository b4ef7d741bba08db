"""Images in any source layout to WebDataset shards with manifest and index; verify them; read them.

Importing the package imports none of its modules: the workers of `pack` need no torch.
"""
