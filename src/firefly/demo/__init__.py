"""The embedded base model and sample data; see NOTICE for sources and licences."""
