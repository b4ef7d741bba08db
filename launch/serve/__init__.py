"""A gallery and its model behind HTTP."""
