"""Commands as functions, one folder for each; every public function returns a report dataclass."""
