"""What each user's adapter has earned on that user's own events."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; every adapter begins anew."""
    op.add_column("adapters", sa.Column("earned", sa.Double, nullable=False, server_default="0"))


def downgrade() -> None:
    """Drop it."""
    op.drop_column("adapters", "earned")
