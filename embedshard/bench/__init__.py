"""What a machine allows and how near the system comes, stage by stage."""
