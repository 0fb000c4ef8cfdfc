"""What is known of users and items beside their clicks."""
