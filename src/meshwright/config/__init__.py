"""The typed tree of a job (`tree`), its files (`files`), overrides (`overrides`) and what is legal (`legality`)."""
