"""Version of the package, in a file of its own: code that writes it into an artefact need not import the root."""

__version__ = "0.1.0"
