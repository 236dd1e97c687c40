"""Where edits come from: the loaders of `datasets`, and what turns edits into batches of prompts."""
