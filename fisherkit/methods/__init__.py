"""What a user asks for, one folder for each command; every function returns a report dataclass."""
