"""What is it trained for? One file per objective and one list."""
