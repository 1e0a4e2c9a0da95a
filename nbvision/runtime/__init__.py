"""Ground floor: which device, whose stream, what memory, and how device code is compiled and cached."""
