"""What the methods do side by side. Nobody has to read this to understand training."""
