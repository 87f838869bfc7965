-- Deleting a completion looks here for each of its choices.

create index on feedback_use (completion_id, choice);
