"""psgrad inside of other libraries."""
