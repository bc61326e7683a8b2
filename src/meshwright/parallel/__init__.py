"""How each scheme runs: one file per scheme, under the same name as its page in schemes/."""
