"""Conversations: what a message is, how it is written as ids, how an answer is read back."""
