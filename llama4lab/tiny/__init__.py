"""The packaged trained checkpoint (data files) and the code that makes it; `CARD.md` describes both."""
