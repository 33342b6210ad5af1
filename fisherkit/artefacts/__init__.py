"""The files that fisherkit itself defines: what is in them, and how they are read and written."""
