set -e
cd /work/main
for w in sleep nginx; do
  target/release/walnut-bench density --count 100 --alone --image-command $w
done
free -m
