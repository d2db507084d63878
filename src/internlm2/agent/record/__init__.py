"""What a run leaves behind: events, transcripts, their second run, how they look in a terminal, pictures as files."""
