"""The command line: one module a noun. Nothing here is imported before its command is called."""
