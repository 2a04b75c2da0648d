"""What the project writes to disk: where it lies, what it is called, and how it is read back."""
