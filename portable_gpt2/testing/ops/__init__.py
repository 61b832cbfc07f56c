"""Each op, as kernel and as definition, in every dtype: its derived bound, and its mathematical properties."""
