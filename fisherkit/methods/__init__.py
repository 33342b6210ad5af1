"""What a user asks for, one file each; every function returns a report dataclass."""
