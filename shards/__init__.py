"""Images in any source layout to WebDataset shards with manifest and index; verify them; read them."""
