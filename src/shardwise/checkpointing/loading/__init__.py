"""Loading: what a checkpoint, a base model or a foreign directory has, matched with what a rank holds."""
