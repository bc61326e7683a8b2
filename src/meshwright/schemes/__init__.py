"""What each scheme is: what it splits, sends, keeps, and in which order. Pure Python, a page each."""
