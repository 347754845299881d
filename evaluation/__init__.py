"""The measuring of quality: how samples are drawn, how arms are compared."""
