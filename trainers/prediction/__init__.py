"""How are records without labels answered? A Ray Data job of pieces."""
