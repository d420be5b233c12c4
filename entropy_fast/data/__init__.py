"""Text and prompts that ship with the package."""
