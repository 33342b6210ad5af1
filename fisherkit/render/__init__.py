"""Pictures, pages and terminal tables of what the methods return; none of it computes a figure."""
