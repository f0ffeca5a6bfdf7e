"""What may people see? Errors that a user can mend, text without keys or control characters, Ctrl-C."""
