"""`make demo`: chat and fine-tune one model at the same time, and see what each costs the other."""
