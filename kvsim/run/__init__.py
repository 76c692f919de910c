"""One run and many: a trace replayed under a setup, in this process or in others."""
