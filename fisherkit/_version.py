"""The version, alone in a file: whoever writes it into an artefact need not import the package's root."""

__version__ = "0.1.0"
