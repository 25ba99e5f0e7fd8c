"""A page to play with: pictures before and after, what the gates read, receipts, erasing. Needs gradio."""
