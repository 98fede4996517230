"""Where the loss meets other libraries. Each module imports its library; the package itself needs none of them."""
