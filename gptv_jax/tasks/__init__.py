"""What fine-tuning teaches a pretrained network: one file a task, and the only list of them."""
