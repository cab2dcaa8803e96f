"""Documents to rows: tokens that know their word, and rows of one length."""
