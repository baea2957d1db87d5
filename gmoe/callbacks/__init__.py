"""Callbacks of other libraries' trainers; each module takes the library that it is named after."""
