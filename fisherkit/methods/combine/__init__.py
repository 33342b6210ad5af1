"""Parts of a Fisher that several runs measured, added to one."""
