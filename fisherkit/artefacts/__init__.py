"""Files that fisherkit itself defines: their content, their readers and writers."""
